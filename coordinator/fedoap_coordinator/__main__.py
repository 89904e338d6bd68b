"""`python -m fedoap_coordinator`."""

from fedoap_coordinator.cli import main

if __name__ == "__main__":
    main()
