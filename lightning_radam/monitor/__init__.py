"""Instability monitoring: signals from the device, detectors on the host, incidents on disk."""
