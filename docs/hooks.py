"""Fills in what the documentation takes from the code: tables of flags, written as `{{ flags module:Class }}`."""
