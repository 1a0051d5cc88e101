"""Estimates the devices, hours and money of a run before devices are rented."""
