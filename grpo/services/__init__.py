"""Handles with the four verbs, supervised replicas, batched calls and failure budgets. No Ray."""
