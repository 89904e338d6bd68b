"""The torch code: network, data, objectives, training, evaluation."""
