"""Built-in foundations: small models that a start pre-trains itself, on text or digits at hand."""
