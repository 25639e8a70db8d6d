"""The project on a GPU that is not there: its real code, on tensors without numbers."""
