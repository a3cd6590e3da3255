"""Turns the list that a user writes into a plan, or into the reasons why no plan is possible."""
