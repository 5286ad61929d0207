"""The demonstration behind `ptif demo`, and the images it runs on."""
