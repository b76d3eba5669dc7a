"""Text: from sources to documents to tokens to windows."""
