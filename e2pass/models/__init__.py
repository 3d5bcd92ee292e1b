"""The networks of the E2-Train paper."""
