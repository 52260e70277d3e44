"""One competition: settings, data, model, and the verbs that lead to a submission."""
