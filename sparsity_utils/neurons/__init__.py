"""Find the FFNs of any model; observe or skip their neurons inside a `with` block."""
