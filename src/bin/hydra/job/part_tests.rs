//! Parts of a job: every model in one of them, under the name that it has in the whole, and what stays together.

use super::Job;
use super::tests::{fault, good};
use hydra::train::{Selection, Verdict};

/// A job of `part` with two models, a grid that is compared by ASHA, one that is not, and one that has patience.
fn job(part: &str) -> Job {
    let model = |name: &str, keys: &str| {
        format!("[[model]]\nname = '{name}'\nfamily = 'gpt2'\ndata = {{ random = true }}\nsteps = 9\n{keys}\n")
    };
    let asha = "stop = { kind = 'asha', first = 2, survivors = [[0, 2], [2]] }";
    good(&format!(
        "[run]\nout = 'all'\n{part}\n{}{}{}{}{}",
        model("a", ""),
        model("b", "search = { lr = [0.1, 0.2, 0.3] }"),
        model("c", &format!("search = {{ lr = [0.1, 0.2, 0.3], {asha} }}")),
        model("d", "search = { lr = [0.1, 0.2], stop = { kind = 'patience', evaluations = 2 } }"),
        model("e", ""),
    ))
}

fn names(job: &Job) -> Vec<&str> {
    job.models.iter().map(|m| m.name.as_str()).collect()
}

#[test]
fn every_model_is_in_one_part_and_those_that_are_compared_in_the_same() {
    let whole = job("");
    assert!(whole.run.out.ends_with("all") && whole.models.len() == 10);
    for count in 1..=8 {
        let parts: Vec<Job> = (0..count).map(|index| job(&format!("part = '{index}/{count}'"))).collect();
        let mut all: Vec<&str> = parts.iter().flat_map(names).collect();
        let is_of_c = |job: &&Job| names(job).iter().any(|name| name.starts_with("c-"));
        assert_eq!(parts.iter().filter(is_of_c).count(), 1, "{count} parts");
        all.sort_unstable();
        let mut want = names(&whole);
        want.sort_unstable();
        assert_eq!(all, want, "{count} parts");
        for (index, part) in parts.iter().enumerate() {
            assert!(part.run.out.ends_with(format!("all/part-{index}-of-{count}")));
            for search in &part.searches {
                let name = |i: usize| part.models[i].name.chars().next().expect("a name");
                let found: Vec<char> = search.models.clone().map(name).collect();
                assert!(!found.is_empty() && found.iter().all(|c| *c == found[0]), "{count} parts: {found:?}");
                // The table that stands for ASHA has the part's own numbers.
                if let Some(Selection::Survivors(table)) = &search.simulated {
                    let first = search.models.start;
                    let goes_on = |i: usize| table.report(first + i, 2) == Verdict::GoOn;
                    assert_eq!([0, 1, 2].map(goes_on), [true, false, true], "{count} parts");
                }
            }
        }
    }
    assert_eq!(names(&job("part = '1/3'")), ["b-lr=0.1", "c-lr=0.1", "c-lr=0.2", "c-lr=0.3", "e"]);
}

#[test]
fn bad_parts() {
    let model = "[[model]]\nname = 'a'\nfamily = 'gpt2'\ndata = { random = true }\nsteps = 3\n";
    let with = |part: &str| format!("[run]\npart = {part}\n{model}");
    for part in ["'8/8'", "'-1/8'", "'1'", "'1/0'", "'a/b'", "''", "3", "'1/2/3'"] {
        let error = fault(&with(part), &[]);
        assert!(
            error.contains("run.part: want a part and how many there are, from \"0/8\" to \"7/8\", got"),
            "{error}"
        );
    }
    let error = fault(&with("'1/2'"), &[]);
    assert!(error.contains("run.part: 1/2 has no model: there are 1; write fewer parts"), "{error}");
    assert_eq!(good(&with("'0/2'")).models.len(), 1);
}
