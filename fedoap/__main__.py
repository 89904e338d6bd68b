"""`python -m fedoap`."""

from fedoap.cli import main

if __name__ == "__main__":
    main()
