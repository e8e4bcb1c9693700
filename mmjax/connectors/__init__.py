"""Connectors: how many media tokens survive, and in which space."""
