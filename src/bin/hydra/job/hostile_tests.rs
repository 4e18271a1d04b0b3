//! Job files that a generator has spoilt must not panic.

use super::Job;
use super::tests::{WHOLE, check, check_with, good};
use hydra::base::Error;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// A good file with pieces cut out, doubled, or overwritten: an answer or bad input on one line, never a panic.
    #[test]
    fn mutated_files_do_not_panic(
        edits in prop::collection::vec((0usize..2400, 0usize..40, prop_oneof![
            Just("".to_string()), "[a-z0-9.=\\[\\]{}\"'\n, -]{0,6}", "\\PC{0,3}",
            Just("-1".into()), Just("nan".into()), Just("9223372036854775807".into()), Just("1e400".into()),
        ]), 1..4),
    ) {
        let mut text: Vec<char> = WHOLE.chars().collect();
        for (at, long, with) in edits {
            let at = at.min(text.len());
            let end = (at + long).min(text.len());
            text.splice(at..end, with.chars());
        }
        let text: String = text.into_iter().collect();
        if let Err(error) = check(&text) {
            prop_assert!(matches!(error, Error::BadInput(_)));
            prop_assert_eq!(error.to_string().lines().count(), 1);
        }
    }

    /// Values of every type under every key of the good file, by way of an override.
    #[test]
    fn foreign_values_do_not_panic(
        path in prop::sample::select(vec![
            "run", "run.out", "run.trace", "run.trace.first", "run.slots", "device", "device.0", "device.0.memory",
            "device.0.link", "device.1.flops", "host.disk", "model", "model.0", "model.0.name", "model.0.config",
            "model.0.data", "model.0.data.text", "model.0.valid.every", "model.0.batch", "model.0.microbatch",
            "model.0.steps", "model.0.betas", "model.0.optimizer", "model.0.schedule", "model.0.search", "model.2.search",
            "model.2.search.lr", "model.2.search.lr.0", "model.2.search.draw", "model.2.search.betas", "model.2.search.stop",
            "model.2.search.stop.first", "model.2.search.stop.survivors", "model.2.search.stop.survivors.1.0",
        ]),
        value in prop_oneof![
            Just("{}".to_string()), Just("[]".into()), Just("[[]]".into()), Just("[{}]".into()), Just("true".into()),
            Just("07:32:00".into()), Just("nan".into()), Just("-inf".into()), Just("\"\\n\"".into()),
            any::<i64>().prop_map(|n| n.to_string()), any::<f64>().prop_map(|n| n.to_string()), "\\PC{0,12}",
        ],
    ) {
        match check_with(WHOLE, &[&format!("{path}={value}")]) {
            Ok(job) => {
                let names = |job: &Job| job.models.iter().map(|m| m.name.clone()).collect::<Vec<_>>();
                prop_assert_eq!(names(&good(&job.source_text)), names(&job));
            }
            Err(Error::BadInput(message)) => prop_assert_eq!(message.lines().count(), 1),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
