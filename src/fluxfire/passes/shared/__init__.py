"""Helpers of several passes."""
