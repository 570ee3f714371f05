"""Campaigns: many faults at random, counted; short in pytest, long by ``python tests/campaigns/run.py --long``."""
