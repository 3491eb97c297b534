"""``lightning-hub doctor``: is this machine fit for training, and are its numbers right?"""
