"""Which backend runs what, and how its library is found, compiled and loaded."""
