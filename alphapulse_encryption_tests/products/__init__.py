"""Databases in the manner of public products, and the whole way through each, there and back."""
