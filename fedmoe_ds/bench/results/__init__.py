"""Results: the stored documents of all measurements, the table of targets, and the page of both."""
