"""Sources to documents to tokens to windows."""
