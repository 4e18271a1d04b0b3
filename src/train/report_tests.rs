//! Tests of the report: a run that trains under a budget, what may be missing, and what is damaged.

use super::*;
use crate::base::LaneKind;
use crate::data::{Source, Text, TextOptions, TextSource, Tokenizer};
use crate::device::sim::CostModel;
use crate::engine::predict;
use crate::spill::PlanOptions;
use crate::trace::{Keep, Recorder, RecorderOptions, TaskName, What};
use crate::train::metrics::{Metrics, ValidRow};
use crate::train::{
    Observer, Schedule, Session, StepReport, TrainOptions, Weights, inputs_of, plan_model, trace_model,
};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Writes rows as the program does.
struct Rows(Metrics, f64);

impl Observer for Rows {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        let tokens_per_sec = Some(self.1 / report.result.secs);
        self.0.write(&Row::Step(StepRow { tokens_per_sec, ..StepRow::new(report) }))
    }

    fn valid(&mut self, step: u64, loss: f32, secs: f64) -> Result<()> {
        self.0.write(&Row::Valid(ValidRow { step, valid_loss: loss, secs }))
    }
}

/// Size of a run.
struct Size {
    steps: u64,
    layers: usize,
    width: usize,
    context: usize,
    batch: usize,
    /// Of the bytes between the smallest peak and the resident one, how many are granted.
    budget: f64,
    link: Option<f64>,
    valid_every: u64,
    keep: (u64, u64),
}

const SMALL: Size = Size {
    steps: 12,
    layers: 3,
    width: 32,
    context: 31,
    batch: 3,
    budget: 0.3,
    link: None,
    valid_every: 5,
    keep: (2, 4),
};

/// Trains a GPT on this crate's own text and leaves a run directory.
fn train(run: &Path, size: &Size) {
    let config = serde_json::json!({
        "n_layer": size.layers, "n_embd": size.width, "n_head": 2, "n_positions": size.context, "vocab_size": 256,
    });
    let network = crate::nn::from_config("gpt2", &config).unwrap();
    let text = Text::read(&[Path::new(env!("CARGO_MANIFEST_DIR")).join("src/trace")], &Tokenizer::Bytes).unwrap();
    let windows = TextOptions { context: size.context, batch: size.batch, seed: 1, valid_fraction: 0.02 };
    let split = TextSource::open(&text, &windows).unwrap();
    let (source, valid) = (Box::new(split.train), split.valid.map(|valid| Box::new(valid) as Box<dyn Source>));
    let cost = CostModel::stated(6e10, 1e10, size.link.unwrap_or(5e9));
    let mut options = TrainOptions { batch: size.batch, microbatch: size.batch, ..TrainOptions::new(size.steps) };
    options.valid_every = size.valid_every;
    options.schedule = Schedule::Cosine { warmup: size.steps / 5, min_lr: 1e-4 };
    options.clip = Some(1.0);
    options.device = crate::device::host::HostSpec { link_bytes_per_sec: size.link, ..Default::default() }.into();
    let model = Arc::new(trace_model(network.as_ref(), &inputs_of(source.as_ref()), &options).unwrap());
    let whole = plan_model(&model, &options, &cost).unwrap();
    let (least, most) = (whole.smallest_device_bytes, whole.arena.bytes);
    let budget = least + ((most - least) as f64 * size.budget) as u64;
    options.plan = PlanOptions { device_budget: Some(budget), ..PlanOptions::default() };
    let plan = plan_model(&model, &options, &cost).unwrap();
    let prediction = predict(&model, &plan, &cost).unwrap();
    let shards: Vec<_> = (0..plan.shards.len())
        .map(|s| {
            let shard = &plan.shards[s];
            serde_json::json!({
                "layers": plan.layer_names(&model, s), "bytes": shard.fetch_bytes(), "tiers": { "weights": "pageable", "boundary_activations": "device" },
                "forward_secs": shard.forward_secs(&cost), "backward_secs": shard.backward_secs(&cost),
            })
        })
        .collect();
    let plan_json = serde_json::json!({
        "device_peak_bytes": plan.arena.bytes, "smallest_device_bytes": plan.smallest_device_bytes, "shards": shards.len(),
        "step_secs": prediction.step_secs, "bound_secs": prediction.bound_secs, "slots": plan.choice.slots,
        "resident": plan.choice.resident, "budget": budget, "ceilings": { "flops_per_sec": cost.best_flops_per_sec(), "h2d_bytes_per_sec": cost.h2d_bytes_per_sec }, "a key of tomorrow": [1, {}],
        "models": [{ "name": "gpt", "shards": shards }],
    });
    std::fs::create_dir_all(run.join("gpt")).unwrap();
    std::fs::write(run.join("plan.json"), plan_json.to_string()).unwrap();
    let mut session = Session::new(Weights::Random, (model, plan), source, valid, options).unwrap();
    let keep = Keep { first: size.keep.0, last: size.keep.1, total_steps: size.steps };
    let mut lanes: Vec<LaneId> = LaneKind::ALL[..3].iter().map(|&kind| LaneId::device(0, kind)).collect();
    lanes.push(LaneId::host(LaneKind::HostMath));
    let options = RecorderOptions::new(keep, lanes, vec!["gpt".into()]);
    session.engine_mut().record(Recorder::create(&run.join("trace.json"), options).unwrap());
    let mut rows = Rows(Metrics::open(&run.join("gpt/metrics.jsonl"), 0).unwrap(), (size.batch * size.context) as f64);
    session.run(&mut rows, &AtomicBool::new(false)).unwrap();
    session.engine_mut().take_recorder().unwrap().finish().unwrap();
}

fn report(run: &Path) -> String {
    let page = write_report(run).unwrap();
    assert_eq!(page, run.join("report.html"));
    let left: Vec<_> = std::fs::read_dir(run).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains(".tmp")), "{left:?}");
    let html = std::fs::read_to_string(page).unwrap();
    assert!(html.ends_with("</html>\n") && !html.contains("NaN"));
    let svg = std::fs::read_to_string(run.join("schedule.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    html
}

fn refused(run: &Path, says: &[&str]) {
    let error = write_report(run).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    let text = error.to_string();
    assert!(says.iter().all(|says| text.contains(says)) && !text.contains('\n'), "{text}");
}

#[test]
fn a_run_under_a_budget_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("small");
    train(&run, &SMALL);
    let html = report(&run);
    for says in [
        "<h1>small</h1>",
        "gpt: steps 0 to 11 in ",
        ", median speed ",
        " tokens/s.",
        "The trace holds every event of the steps 0 to 1 and 8 to 11.",
        "% against predicted",
        "of it reached",
        "device budget",
        "held out",
        "device 0 compute",
        "host math",
        "60.00 GFLOP/s",
        "of those whose events were kept (0 to 1 and 8 to 11)",
    ] {
        assert!(html.contains(says), "{says}");
    }
    let trace = Trace::read(&run.join("trace.json")).unwrap();
    assert!(trace.events.iter().all(|event| event.step < 12), "evaluations stand under the step before them");
    let evaluated: BTreeSet<u32> =
        trace.events.iter().filter(|e| e.name.what == What::Eval).map(|event| event.step).collect();
    assert_eq!(evaluated, BTreeSet::from([9, 11]));
    assert_eq!(trace.summary.unwrap().written, trace.events.len() as u64);

    // The same files give the same bytes; a killed run's trace is read as far as it goes; without one the page says so.
    assert_eq!(report(&run), html);
    let bytes = std::fs::read(run.join("trace.json")).unwrap();
    for part in [0, 1, 33, bytes.len() / 2, bytes.len() - 2] {
        std::fs::write(run.join("trace.json"), &bytes[..part]).unwrap();
        assert!(report(&run).contains("The trace breaks off"), "{part} bytes");
    }
    std::fs::remove_file(run.join("trace.json")).unwrap();
    assert!(report(&run).contains("holds no trace.json"));
    std::fs::write(run.join("gpt/metrics.jsonl"), "").unwrap();
    assert!(report(&run).contains("gpt: no steps yet"));
    std::fs::remove_dir_all(run.join("gpt")).unwrap();
    assert!(report(&run).contains("gpt: no steps yet"));
    std::fs::write(run.join("plan.json"), "{}").unwrap();
    assert!(report(&run).contains("The plan lists no shards"));
}

#[test]
fn what_is_missing_or_damaged_is_the_inputs_fault() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    refused(&run.join("nowhere"), &["nowhere", "no run directory"]);
    refused(run, &["plan.json", "is not there"]);
    std::fs::write(run.join("file"), "x").unwrap();
    refused(&run.join("file"), &["file", "no run directory"]);
    for damaged in ["", "{", "[]", "7", "{\"shards\":\"three\"}", "{\"models\":[{\"shards\":7}]}", "\u{0}", "{} {}"] {
        std::fs::write(run.join("plan.json"), damaged).unwrap();
        refused(run, &["plan.json", "damaged"]);
    }
    std::fs::write(run.join("plan.json"), b"{\"models\":[{\"name\":\"\xff\"}]}").unwrap();
    refused(run, &["plan.json", "damaged"]);
    for name in ["", ".", "..", "../elsewhere", "/etc", "a/b"] {
        std::fs::write(run.join("plan.json"), serde_json::json!({ "models": [{ "name": name }] }).to_string()).unwrap();
        refused(run, &["plan.json", "no folder's"]);
    }
    std::fs::write(run.join("plan.json"), "{\"step_secs\":null}").unwrap();
    std::fs::create_dir(run.join("one")).unwrap();
    std::fs::write(run.join("one/metrics.jsonl"), "nonsense\n{}\n").unwrap();
    refused(run, &["one/metrics.jsonl", "line 1"]);
    std::fs::write(run.join("one/metrics.jsonl"), b"\xff\n").unwrap();
    refused(run, &["one/metrics.jsonl"]);
    std::fs::write(run.join("one/metrics.jsonl"), "{\"step\":0,\"valid_loss\":null,\"secs\":1}\n").unwrap();
    for damaged in ["[]", "{}", "\u{0}", "{\"traceEvents\":7}"] {
        std::fs::write(run.join("trace.json"), damaged).unwrap();
        refused(run, &["trace.json"]);
    }
    std::fs::write(run.join("trace.json"), b"\xff").unwrap();
    refused(run, &["trace.json"]);
    std::fs::write(run.join("trace.json"), "{\"traceEvents\":[]}").unwrap();
    let html = report(run);
    assert!(html.contains("one: no steps yet") && html.contains("holds no events"));
    assert!(!run.join("file.tmp").exists());
}

#[test]
fn ceilings_are_the_plans_own() {
    let ceilings = serde_json::json!({
        "flops_per_sec": 3e11, "h2d_bytes_per_sec": 1e10, "d2h_bytes_per_sec": 7e9, "host_update_bytes_per_sec": 6e9,
    });
    let plan: PlanFile = serde_json::from_value(serde_json::json!({ "ceilings": ceilings })).unwrap();
    let peaks = LaneKind::ALL.map(|kind| plan.peak(kind));
    assert_eq!(peaks, [Some(3e11), Some(1e10), Some(7e9), Some(6e9), None, None]);
    for odd in ["{}", "{\"ceilings\":null}", "{\"ceilings\":{\"more\":[{}]}}"] {
        let plan: PlanFile = serde_json::from_str(odd).unwrap();
        assert_eq!(LaneKind::ALL.map(|kind| plan.peak(kind)), [None; 6], "{odd}");
    }
}

#[test]
fn the_plan_is_told_in_few_words() {
    let plan: PlanFile = serde_json::from_value(serde_json::json!({
        "budget": "64 MiB",
        "models": [
            { "name": "a", "shards": [
                { "layers": ["embedding", "h.0", "h.1"], "bytes": 1536, "recompute": true,
                  "tiers": { "weights": "pageable", "moments": "disk", "all_others": "pageable" } },
                { "layers": ["head"], "tiers": "pinned", "forward_secs": 0.25 },
            ] },
            { "name": "b", "shards": [{ "layers": 7, "tiers": ["device", "pageable"] }] },
        ],
    }))
    .unwrap();
    let (columns, rows) = plan.shard_table();
    assert_eq!(columns[..3], ["model", "shard", "layers"]);
    assert_eq!(
        rows[0],
        ["a", "0", "embedding to h.1 (3)", "1.50 KiB", "pageable: all others, weights; disk: moments", "yes", "-", "-"]
    );
    assert_eq!(rows[1], ["a", "1", "head", "-", "pinned", "-", "250.00 ms", "-"]);
    assert_eq!(rows[2], ["b", "0", "7", "-", "device, pageable", "-", "-", "-"]);
    assert_eq!(facts(&plan, &[])[..2], [("shards".into(), "3".into()), ("device budget".into(), "64 MiB".to_string())]);
}

/// One compute event a step of one second; steps of `evaluated` are followed by an evaluation of a second.
fn events(steps: impl IntoIterator<Item = u32>, evaluated: &[u32]) -> Vec<Event> {
    let mut events = Vec::new();
    for (i, step) in steps.into_iter().enumerate() {
        let mut add = |what, start_secs: f64| {
            let ticket = events.len() as u64 + 1;
            let name = TaskName { what, model: 0, shard: 0, microbatch: None };
            let lane = LaneId::device(0, LaneKind::Compute);
            let end_secs = start_secs + 1.0;
            events.push(Event {
                lane,
                name,
                step,
                start_secs,
                end_secs,
                bytes: 0,
                flops: 1.0,
                ticket,
                after: ticket - 1,
            });
        };
        add(What::LastUnit, 2.0 * i as f64);
        if evaluated.contains(&step) {
            add(What::Eval, 2.0 * i as f64 + 1.0);
        }
    }
    events
}

#[test]
fn steady_steps_are_drawn() {
    let check = |steps: Vec<u32>, evaluated: &[u32], want: Option<(u32, u32)>| {
        let shown = shown::choose(&events(steps.clone(), evaluated));
        assert_eq!(shown.as_ref().map(|shown| (shown.first, shown.last)), want, "{steps:?} {evaluated:?}");
        if let Some(shown) = shown {
            assert!(shown.window.0 < shown.window.1 && !shown.events.is_empty());
        }
    };
    check(vec![], &[], None);
    check(vec![0], &[], Some((0, 0)));
    check(vec![0, 1], &[], Some((0, 1)));
    check((0..10).collect(), &[], Some((6, 8)));
    check((0..5).chain(90..100).collect(), &[99], Some((96, 98)));
    // Neither the step that a validation follows nor the one after it.
    check((90..100).collect(), &[97], Some((94, 96)));
    check((90..100).collect(), &[92, 95, 98], Some((97, 97)));
    check((0..3).collect(), &[2], Some((0, 2)));
    // A step before which nothing is known comes last.
    check(vec![7, 9], &[], Some((9, 9)));
    // A window begins and ends where steps begin: six seconds for three.
    let shown = shown::choose(&events(0..10, &[])).unwrap();
    assert_eq!((shown.window, shown.events.len()), ((12.0, 18.0), 3));
    let broken = Event { end_secs: f64::NAN, ..events([3], &[])[0] };
    assert_eq!(shown::choose(&[broken]), None);

    let many: Vec<Event> = (0..6).flat_map(|step| vec![events([step], &[])[0]; 2000]).collect();
    let shown = shown::choose(&many).unwrap();
    assert_eq!(shown.first, shown.last, "a chart of thousands of tasks shows one step");
}

#[test]
fn models_are_colours_over_devices() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let names = ["first", "second", "third"];
    let models: Vec<_> = names.iter().map(|name| serde_json::json!({ "name": name })).collect();
    std::fs::write(run.join("plan.json"), serde_json::json!({ "models": models }).to_string()).unwrap();
    // The first was done already: the run counts the others from 0.
    let lane = |d, kind| LaneId::device(d, kind);
    let lanes: Vec<_> =
        (0..3).flat_map(|d| LaneKind::ALL[..3].iter().map(move |&kind| LaneId::device(d, kind))).collect();
    let keep = Keep { first: 9, last: 9, total_steps: 9 };
    let options = RecorderOptions::new(keep, lanes, vec!["second".into(), "third".into()]);
    let mut recorder = Recorder::create(&run.join("trace.json"), options).unwrap();
    let mut ticket = 0;
    let mut add = |d, kind, what, model, step, (start_secs, end_secs)| {
        ticket += 1;
        let name = TaskName { what, model, shard: 0, microbatch: None };
        let lane = lane(d, kind);
        recorder.record(&Event { lane, name, step, start_secs, end_secs, bytes: 8, flops: 1.0, ticket, after: 0 });
    };
    // Device 0: computes 0-4 and 6-8, copies 3-6: 6 of 8 seconds, 2 alone, none idle. Device 1: computes 2-4, copies
    // 5-6 both ways at once.
    for step in 0..4 {
        let at = f64::from(step);
        add(0, LaneKind::Compute, What::LastUnit, 0, step, (at, at + 1.0));
    }
    add(0, LaneKind::HostToDevice, What::FetchWeights, 1, 0, (3.0, 6.0));
    add(0, LaneKind::Compute, What::LastUnit, 0, 4, (6.0, 8.0));
    add(1, LaneKind::Compute, What::LastUnit, 1, 0, (2.0, 4.0));
    add(1, LaneKind::HostToDevice, What::FetchWeights, 1, 1, (5.0, 6.0));
    add(1, LaneKind::DeviceToHost, What::SpillWeights, 1, 1, (5.0, 6.0));
    recorder.finish().unwrap();
    let header = "name,lr,status,reason,steps_done,train_loss,valid_loss,secs,directory\n";
    let rows = "first,1e-3,done,,9,0.123456,,1.5,/a\nsecond,,failed,\"a, b\",5,NaN,2,0,/b\n";
    std::fs::write(run.join("results.csv"), format!("{header}{rows}")).unwrap();
    let html = report(run);
    for says in [
        "<th>model</th><th class=\"n\">lr</th><th>status</th>",
        "<td>first</td><td class=\"n\">1e-3</td><td>done</td><td class=\"n\">9</td><td>0.1235</td>",
        "<td>second</td><td class=\"n\">-</td><td>failed: a, b</td>",
        "<td>device 0</td><td class=\"n\">75.0 %</td><td class=\"n\">25.0 %</td><td class=\"n\">0.0 %</td><td class=\"n\">37.5 %</td>",
        "<td>device 1</td><td class=\"n\">25.0 %</td><td class=\"n\">12.5 %</td><td class=\"n\">62.5 %</td><td class=\"n\">12.5 %</td>",
        "<td>device 2</td><td class=\"n\">0.0 %</td><td class=\"n\">0.0 %</td><td class=\"n\">100.0 %</td>",
        "Step 3 of second of those whose events were kept (0 to 4), with all that ran meanwhile.",
    ] {
        assert!(html.contains(says), "{says}\n{html}");
    }
    let svg = std::fs::read_to_string(run.join("schedule.svg")).unwrap();
    // The names stand in the legend in the colours of their curves; each device's lanes are rows.
    for says in [
        ">second</text>",
        ">third</text>",
        "device 0 compute",
        "device 1 compute",
        "fill=\"#dd6f3c\"",
        "fill=\"#3f9d5a\"",
    ] {
        assert!(svg.contains(says), "{says}");
    }
    assert!(!svg.contains(">first</text>") && !svg.contains("fill=\"#4c8bd6\""));
    std::fs::write(run.join("results.csv"), "name,status\nfirst\n").unwrap();
    refused(run, &["results.csv", "damaged"]);
}

#[test]
fn kept_time_is_counted_once() {
    assert_eq!(shown::kept_windows(&[]), []);
    // Steps 0, 1 and 5, 6 at seconds 0, 2, 4, 6: each pair spans 3 seconds.
    let one = events([0, 1, 5, 6], &[]);
    assert_eq!(shown::kept_windows(&one), [(0.0, 3.0), (4.0, 7.0)]);
    let mut two = one.clone();
    two.extend(one.iter().map(|e| Event { name: TaskName { model: 1, ..e.name }, ..*e }));
    assert_eq!(shown::kept_windows(&two), [(0.0, 3.0), (4.0, 7.0)], "another model beside it adds nothing");
    // A model whose steps 1 to 3 are missing from second 1 to second 2.5 takes that time away.
    let other = |step, start_secs: f64| Event {
        name: TaskName { model: 1, ..one[0].name },
        step,
        start_secs,
        end_secs: start_secs + 1.0,
        ..one[0]
    };
    let three: Vec<Event> = one.iter().copied().chain([other(0, 0.0), other(4, 2.5)]).collect();
    let windows = shown::kept_windows(&three);
    assert_eq!(windows, [(0.0, 1.0), (2.5, 3.0), (4.0, 7.0)]);
    // Overlaps count once, and what lies outside the windows not at all.
    assert_eq!(
        shown::covered_secs(vec![(2.0, 4.5), (0.5, 0.75), (2.75, 5.0), (9.0, 10.0)], &windows),
        0.25 + 0.5 + 1.0
    );
    let text = |steps: &[u32]| shown::steps_text(&steps.iter().copied().collect());
    assert_eq!(text(&[]), "none");
    assert_eq!(text(&[4]), "4");
    assert_eq!(text(&[0, 1, 2, 7, 9, 10]), "0 to 2, 7 and 9 to 10");
    assert_eq!(text(&(0..20).map(|i| i * 3).collect::<Vec<_>>()), "20 of those from 0 to 57");
}

#[test]
fn medians_leave_out_the_start() {
    for (values, want) in [
        (vec![], None),
        (vec![f64::NAN], None),
        (vec![3.0], Some(3.0)),
        (vec![1.0, 4.0], Some(2.5)),
        (vec![9.0, f64::INFINITY, 1.0, 2.0], Some(2.0)),
    ] {
        assert_eq!(median(values.clone()), want, "{values:?}");
    }
}
