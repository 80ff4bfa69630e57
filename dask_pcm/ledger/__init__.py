"""The ledger: an output's own record of what is done, to the row range."""
