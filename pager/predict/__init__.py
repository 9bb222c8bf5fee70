"""Predictors: which experts a prompt will want, before its prefill."""
