"""The toolkit in a worker process: the plugin, and what tasks call."""
