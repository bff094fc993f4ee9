"""What a run has around its loop (train.py): plan, folder, metrics, evaluations, guards."""
