"""Files of recipes: staged from stores and peers, cached on a host's disk."""
