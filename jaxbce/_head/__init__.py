"""The last layer and its loss, without the logits."""
