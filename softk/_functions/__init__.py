"""The public functions: arguments made canonical, a primitive applied, and the results put back."""

from . import adapters as adapters  # so that the adapters are known wherever an array comes in
