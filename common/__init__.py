"""What every part needs: device, errors, files, JSON records, calls to the Hub."""
