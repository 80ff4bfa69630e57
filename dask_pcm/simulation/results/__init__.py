"""Tables, CSV files and plots of a simulation."""
