"""What it costs: programs that measure, by hand. They need the extras of the tests."""
