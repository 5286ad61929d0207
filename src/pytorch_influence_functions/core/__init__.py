"""What every other folder uses: errors, progress, files, fingerprints, validation, distributed reductions."""
