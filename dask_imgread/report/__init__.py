"""The HTML report and the contact sheet of a job."""
