"""Tables that are not measured on runs one by one: speeds, opened models, digits; each module ends with its MAKERS."""
