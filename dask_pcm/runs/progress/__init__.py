"""How a run stands: its status, its meter and its report."""
