"""`python -m fedoap_node` is `fedoap-node`."""

from fedoap_node.cli import main

main()
