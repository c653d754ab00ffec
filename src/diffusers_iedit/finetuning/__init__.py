"""What training/train_iedit.py is made of, beside the losses: `hub.py` writes the model's card and pushes it."""
