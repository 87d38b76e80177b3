"""Measured cost, beside the peers."""
