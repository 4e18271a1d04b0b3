//! Searches of a job: which models come of them, in which order and under which names, and what is refused.

use super::Job;
use super::model::Length;
use super::tests::{check_with, fault, good};
use hydra::train::{Asha, Optimizer, Patience, Rungs, Selection, Survivors, Verdict};

/// A model named `a` with `lines` under it.
fn model(lines: &str) -> String {
    format!("[[model]]\nname = 'a'\nfamily = 'gpt2'\ndata = {{ random = true }}\n{lines}\n")
}

fn names(job: &Job) -> Vec<&str> {
    job.models.iter().map(|m| m.name.as_str()).collect()
}

fn lr(job: &Job, i: usize) -> f64 {
    job.models[i].optimizer.lr()
}

#[test]
fn a_grid_has_its_last_key_fastest() {
    // The order of keys is the program's, so that names do not depend on how the file has them.
    for search in ["lr = [1e-3, 3e-4], batch = [16, 32, 8]", "batch = [16, 32, 8], lr = [0.001, 0.0003]"] {
        let job = good(&model(&format!("steps = 9\nsearch = {{ {search} }}")));
        let want = [
            "a-lr=1e-3-batch=16",
            "a-lr=1e-3-batch=32",
            "a-lr=1e-3-batch=8",
            "a-lr=3e-4-batch=16",
            "a-lr=3e-4-batch=32",
            "a-lr=3e-4-batch=8",
        ];
        assert_eq!(names(&job), want);
        assert_eq!((0..6).map(|i| lr(&job, i)).collect::<Vec<_>>(), [1e-3, 1e-3, 1e-3, 3e-4, 3e-4, 3e-4]);
        // Left out, the microbatch is the batch of each.
        let batches: Vec<_> = job.models.iter().map(|m| (m.batch, m.microbatch)).collect();
        assert_eq!(batches, [(16, 16), (32, 32), (8, 8), (16, 16), (32, 32), (8, 8)]);
        let last = &job.models[5];
        assert_eq!(last.at, "model.0.search: lr = 3e-4, batch = 8");
        assert_eq!(last.place("data.text"), "model.0.search: lr = 3e-4, batch = 8: data.text");
        let pair = |key: &str, word: &str| (key.to_string(), word.to_string());
        assert_eq!(last.searched, [pair("lr", "3e-4"), pair("batch", "8")]);
        let [search] = &job.searches[..] else { panic!("one search") };
        assert_eq!((search.at.as_str(), &search.models), ("model.0.search", &(0..6)));
        assert_eq!((&search.stop, &search.simulated), (&None, &None));
    }
}

/// Each search goes into a model of 9 steps, with what it makes of the model's name.
#[test]
fn words_of_values() {
    for (search, want) in [
        ("lr = [1, 0.1, 0.01, 0.00035, 1000.0, 2e-300]", "lr=1 lr=0.1 lr=0.01 lr=3.5e-4 lr=1e3 lr=2e-300"),
        ("lr = [0.1000000000000000055]", "lr=0.1"),
        ("betas = [[0.9, 0.95], [0.0, 0.999]]", "betas=0.9,0.95 betas=0,0.999"),
        ("decay = ['all', 'matrices']", "decay=all decay=matrices"),
        ("dtype = ['bf16', 'f32']", "dtype=bf16 dtype=f32"),
        ("eps = [1e-8], weight_decay = [0.0], clip = [1.0]", "eps=1e-8-weight_decay=0-clip=1"),
        ("steps = [9, 20]", "steps=9 steps=20"),
    ] {
        let job = good(&model(&format!("steps = 9\nsearch = {{ {search} }}")));
        let want: Vec<String> = want.split(' ').map(|word| format!("a-{word}")).collect();
        assert_eq!(names(&job), want);
    }
    let job = good(&model(
        "steps = 9\noptimizer = { kind = 'sgd', momentum = 0.5 }\nsearch = { nesterov = [false, true], momentum = [0.9] }",
    ));
    assert_eq!(names(&job), ["a-momentum=0.9-nesterov=false", "a-momentum=0.9-nesterov=true"]);
    assert!(matches!(job.models[1].optimizer, Optimizer::Sgd { momentum: 0.9, nesterov: true, .. }));
}

#[test]
fn values_replace_the_models_own() {
    let job = good(&model(
        "batch = 16\nmicrobatch = 8\nepochs = 7\noptimizer = { lr = 0.5, eps = 0.25 }\nsearch = { lr = [1e-3], batch = [24], epochs = [2] }",
    ));
    let one = &job.models[0];
    assert_eq!((one.batch, one.microbatch, one.length), (24, 8, Length::Epochs(2)));
    assert!(matches!(one.optimizer, Optimizer::Adamw { lr: 1e-3, epsilon: 0.25, .. }));
    // An override reaches into a search, and the record of the job makes the same models.
    let text = model("steps = 9\nsearch = { lr = [1e-3, 3e-4] }");
    let job = check_with(&text, &["model.0.search.lr=[1e-6, 2.50]", "model.0.search.draw=1"]).unwrap();
    assert_eq!(names(&good(&job.source_text)), names(&job));
    assert!(["a-lr=1e-6", "a-lr=2.5"].contains(&names(&job)[0]) && job.models.len() == 1);
}

#[test]
fn draws_are_distinct_and_follow_the_seed() {
    let text = |seed: u64, draw: u64| {
        let lists = "lr = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3], batch = [1, 2, 3, 4, 5, 6, 7]";
        format!("[run]\nseed = {seed}\n{}", model(&format!("steps = 9\nsearch = {{ {lists}, draw = {draw} }}")))
    };
    let grid = good(&text(0, 35));
    assert_eq!(grid.models.len(), 35);
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..40 {
        let job = good(&text(seed, 4));
        let drawn: Vec<String> = names(&job).iter().map(|name| name.to_string()).collect();
        // In the grid's order, which also says that no two are the same.
        let places: Vec<_> =
            drawn.iter().map(|name| names(&grid).iter().position(|n| n == name).expect("in the grid")).collect();
        assert!(places.len() == 4 && places.is_sorted_by(|a, b| a < b), "{places:?}");
        assert_eq!(names(&good(&text(seed, 4))), drawn);
        seen.extend(places);
    }
    // 160 draws of 35: each is missed with a chance of (31/35)^40, below 1 %.
    assert!(seen.len() >= 33, "{seen:?}");
    // Worked out by another program: a change of the stream would give unfinished runs other models.
    assert_eq!(names(&good(&text(7, 2))), ["a-lr=1e-3-batch=7", "a-lr=2e-3-batch=5"]);
    // Two searches draw for themselves; a large grid may be drawn from, and is not written down for that.
    let twice = format!("{}{}", model("steps = 9\nsearch = { batch = [1, 2, 3, 4, 5, 6, 7, 8, 9], draw = 3 }"), {
        model("steps = 9\nsearch = { batch = [1, 2, 3, 4, 5, 6, 7, 8, 9], draw = 3 }").replace("'a'", "'b'")
    });
    let job = good(&twice);
    let batches = |range: std::ops::Range<usize>| job.models[range].iter().map(|m| m.batch).collect::<Vec<_>>();
    assert_ne!(batches(0..3), batches(3..6));
    let many: Vec<String> = (1..=100).map(|n| n.to_string()).collect();
    let many = many.join(", ");
    let huge = format!("steps = 9\nsearch = {{ lr = [{many}], eps = [{many}], clip = [{many}], batch = [{many}]");
    assert_eq!(good(&model(&format!("{huge}, draw = 5 }}"))).models.len(), 5);
    assert!(
        fault(&model(&format!("{huge} }}")), &[]).contains("model.0.search: has 100000000 combinations, more than")
    );
    let beyond = format!(
        "{huge}, steps = [{many}], epochs = [{many}], weight_decay = [{many}], momentum = [{many}], microbatch = [{many}], betas = [{many}], draw = 5 }}"
    );
    assert!(fault(&model(&beyond), &[]).contains("model.0.search: has more combinations than can be counted"));
}

/// Each line goes under a model of 9 steps.
#[test]
fn bad_searches() {
    for (line, want) in [
        ("search = {}", "model.0.search: is empty; write what to try, such as { lr = [1e-3, 3e-4] }"),
        ("search = 3", "model.0.search: want a table"),
        (
            "search = { rl = [1] }",
            "model.0.search.rl: unknown key; did you mean `lr`? (the keys here are lr, betas, eps,",
        ),
        ("search = { kind = ['sgd'] }", "model.0.search.kind: unknown key"),
        ("search = { name = ['b'] }", "nesterov, batch, microbatch, steps, epochs, dtype, draw, stop"),
        ("search = { lr = 1e-3 }", "model.0.search.lr: want a list of values to try, such as [1e-3, 3e-4], got 0.001"),
        ("search = { lr = [] }", "model.0.search.lr: want a list of values to try"),
        ("search = { lr = [1e-3, 0.001] }", "model.0.search.lr: 1e-3 is there twice"),
        ("search = { batch = [2, 4, 2] }", "model.0.search.batch: 2 is there twice"),
        ("search = { lr = [1, 1.0] }", "model.0.search.lr: 1 is there twice"),
        // What each combination is read as is checked as if somebody had written it.
        ("search = { lr = [1e-3, -1] }", "model.0.search: lr = -1: optimizer.lr: want a number of at least 0"),
        ("search = { lr = ['fast'] }", "model.0.search: lr = fast: optimizer.lr: want a number"),
        ("search = { lr = [nan] }", "model.0.search: lr = NaN: optimizer.lr: want a number"),
        ("search = { lr = [{}] }", "model.0.search: lr = table: optimizer.lr: want a number"),
        ("search = { lr = [[[1]]] }", "model.0.search: lr = 1: optimizer.lr: want a number"),
        ("search = { dtype = ['a/b\\n'] }", "model.0.search: dtype = a_b_n: dtype: want one of"),
        ("search = { dtype = ['f16', 'f32'] }", "got \"f16\"; did you mean"),
        ("search = { batch = [1.5] }", "model.0.search: batch = 1.5: batch: want a whole number from 1"),
        (
            "microbatch = 4\nsearch = { lr = [0.5], batch = [8, 10] }",
            "model.0.search: lr = 0.5, batch = 10: microbatch: 4 does not divide the batch of 10; 2 does",
        ),
        ("microbatch = 4\nsearch = { lr = [0.5] }", "model.0.search: lr = 0.5: microbatch: 4 does not divide"),
        ("search = { epochs = [2] }", "model.0.search: epochs = 2: epochs: steps is there too"),
        ("search = { momentum = [0.9] }", "model.0.search: momentum = 0.9: optimizer.momentum: is for kind = \"sgd\""),
        ("optimizer = 3\nsearch = { lr = [1] }", "model.0.search: lr = 1: optimizer: want a table"),
        ("dtype = 3\nsearch = { draw = 1 }", "model.0.dtype: want one of"),
        ("search = { lr = [1, 2], draw = 3 }", "model.0.search.draw: there are 2 combinations; write at most 2"),
        ("search = { lr = [1, 2], draw = 0 }", "model.0.search.draw: want a whole number from 1 to 1000"),
        ("search = { lr = [1, 2], draw = [1] }", "model.0.search.draw: want a whole number"),
        ("search = { stop = 3 }", "model.0.search.stop: want a table"),
        ("search = { stop = {} }", "model.0.search.stop.kind: is missing; write kind = \"asha\" or \"patience\""),
        (
            "search = { stop = { kind = 'ahsa' } }",
            "want one of \"asha\", \"patience\", got \"ahsa\"; did you mean \"asha\"?",
        ),
        (
            "search = { stop = { kind = 'asha', frist = 3 } }",
            "model.0.search.stop.frist: unknown key; did you mean `first`? (the keys here are kind, first, eta, survivors, evaluations)",
        ),
        ("search = { stop = { kind = 'asha' } }", "model.0.search.stop.first: is missing; write the steps"),
        ("search = { stop = { kind = 'asha', first = 0 } }", "model.0.search.stop.first: want a whole number from 1"),
        ("search = { stop = { kind = 'asha', first = 3, eta = 1 } }", "stop.eta: want a whole number from 2"),
        (
            "search = { stop = { kind = 'asha', first = 3, evaluations = 1 } }",
            "stop.evaluations: is for kind = \"patience\"",
        ),
        ("search = { stop = { kind = 'asha', first = 9 } }", "stop.first: no model has more than 9 steps; write fewer"),
        ("search = { stop = { kind = 'patience' } }", "model.0.search.stop.evaluations: is missing; write how many"),
        ("search = { stop = { kind = 'patience', evaluations = 0 } }", "stop.evaluations: want a whole number from 1"),
        (
            "search = { stop = { kind = 'patience', evaluations = 3, eta = 3 } }",
            "stop.eta: is for kind = \"asha\" only",
        ),
        ("search = { stop = { kind = 'patience', survivors = [[0]] } }", "stop.survivors: is for kind = \"asha\" only"),
    ] {
        let message = fault(&model(&format!("steps = 9\n{line}")), &[]);
        assert!(message.contains(want), "{line}\n got {message}\nwant {want}");
        assert!(message.len() < 400, "{message}");
    }
    let survivors = |table: &str| {
        let stop = format!("stop = {{ kind = 'asha', first = 3, survivors = {table} }}");
        fault(&model(&format!("steps = 9\nsearch = {{ lr = [1, 2, 3], {stop} }}")), &[])
    };
    for (table, want) in [
        ("3", "want a list per rung with the models that go on, such as [[0, 2], [2]], numbers from 0 to 2, got 3"),
        ("[]", "want a list per rung"),
        ("[0, 2]", "want a list per rung"),
        ("[[0, 3]]", "want a list per rung"),
        ("[[-1]]", "want a list per rung"),
        ("[[]]", "rung 0 has no survivor"),
        ("[[0, 0]]", "rung 0 has model 0 twice"),
        ("[[0], [1]]", "model 1 survives rung 1 but not rung 0"),
    ] {
        let message = survivors(table);
        assert!(message.contains(&format!("model.0.search.stop.survivors: {want}")), "{table}: {message}");
    }
}

#[test]
fn two_searches_and_names_that_clash() {
    let other = |lines: &str| model(lines).replace("'a'", "'b'");
    let searched = model("steps = 9\nsearch = { lr = [1, 2] }");
    let text = format!("{}{searched}{}", model("steps = 3").replace("'a'", "'first'"), {
        other("steps = 9\nsearch = { batch = [4, 6, 8], stop = { kind = 'asha', first = 2, survivors = [[0, 2]] } }")
    });
    let job = good(&text);
    assert_eq!(names(&job), ["first", "a-lr=1", "a-lr=2", "b-batch=4", "b-batch=6", "b-batch=8"]);
    assert_eq!(job.models[5].at, "model.2.search: batch = 8");
    let [lr, batch] = &job.searches[..] else { panic!("two searches") };
    assert_eq!((lr.at.as_str(), &lr.models, &lr.stop), ("model.1.search", &(1..3), &None));
    assert_eq!((batch.at.as_str(), &batch.models), ("model.2.search", &(3..6)));
    let rungs = Rungs::new(2, 3).unwrap();
    assert_eq!(batch.stop, Some(Selection::Asha(Asha::new(rungs))));
    // The file's numbers are the search's own; the rule's are the job's.
    let table = Survivors::new(rungs, vec![vec![3, 5]]).unwrap();
    assert_eq!([3, 4, 5].map(|model| table.report(model, 2) == Verdict::GoOn), [true, false, true]);
    assert_eq!(batch.simulated, Some(Selection::Survivors(table)));

    // A search that only stops early leaves the model as it is.
    let job = good(&model("steps = 9\nsearch = { stop = { kind = 'patience', evaluations = 3 } }"));
    assert_eq!((names(&job), &job.models[0].searched, job.models[0].at.as_str()), (vec!["a"], &vec![], "model.0"));
    let [search] = &job.searches[..] else { panic!("one search") };
    assert_eq!((&search.stop, &search.simulated), (&Some(Selection::Patience(Patience::new(3))), &None));

    let twin = model("steps = 9").replace("'a'", "'a-lr=2'");
    let message = fault(&format!("{searched}{twin}"), &[]);
    assert!(message.contains("model.1.name: model.0.search: lr = 2 has the name \"a-lr=2\" too"), "{message}");
    let message = fault(&format!("{twin}{searched}"), &[]);
    assert!(message.contains("model.1.search: lr = 2: name: model.0 has the name \"a-lr=2\" too"), "{message}");
    let message = fault(&format!("{searched}{searched}"), &[]);
    assert!(message.contains("model.1.search: lr = 1: name: model.0.search: lr = 1 has the name"), "{message}");
    let long = searched.replace("'a'", &format!("'{}'", "n".repeat(198)));
    let message = fault(&long, &[]);
    assert!(message.contains("model.0.name: nnn") && message.contains("203 bytes long, more than 200"), "{message}");
    assert!(fault(&searched.replace("'a'", "'a/b'"), &[]).contains("model.0.name: want a plain file name"));
    assert_eq!(good(&long.replace(&"n".repeat(198), &"n".repeat(195))).models.len(), 2);
}
