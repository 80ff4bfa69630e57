"""The ledger: a commit log in the output itself, which records finished work to the row range."""
