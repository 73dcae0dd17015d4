"""Guidance: functions that wrap a denoiser and give a denoiser back, one file each."""
