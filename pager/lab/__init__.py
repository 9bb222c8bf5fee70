"""Measurements and fitting: what pools cost, what gates learned, replays. Nothing that serves imports it."""
