"""Measurements and fitting: what pools cost, what routers learned, replays. Nothing that serves imports it."""
