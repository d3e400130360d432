"""Comparisons with other methods: reconstruction, image sets, speed."""
