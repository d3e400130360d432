"""Questions about image sets, answered by every fusion."""
