"""FedOAP: personalised federated tumour segmentation over a secure message layer (arXiv 2511.18847)."""

__version__ = "0.1.0"
