"""Recipes for every family and size, written from one base."""
