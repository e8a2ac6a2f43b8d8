"""The public functions. Each converts its arguments to canonical form, applies a primitive and converts the results."""

from . import adapters as adapters  # importing it registers the adapters
