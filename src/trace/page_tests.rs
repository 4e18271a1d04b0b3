//! Tests of the report page: well-formed for every kind of absence, escaped, and free of links.

use super::*;
use crate::trace::StepAccount;
use crate::trace::sample::Schedule;
use crate::trace::svg::tests::check_tags;
use crate::trace::utilisation::where_time_went;

/// A run of `steps` steps: falling loss with noise, warm-up and cosine, the sample schedule.
fn sample(steps: u64, models: usize) -> ReportData {
    let wave = |step: u64, k: f64| ((step as f64 * k).sin() + (step as f64 * k * 2.7).cos()) * 0.5;
    let curves = |i: usize| {
        let loss = |step: u64| 1.4 + 4.1 * (-(step as f64) / (40.0 + 15.0 * i as f64)).exp() + 0.1 * i as f64;
        let warm = |step: u64| (step as f64 + 1.0).min(20.0) / 20.0;
        let rate = |step: u64| {
            warm(step) * (3e-5 + 1.35e-4 * (1.0 + (step as f64 / steps as f64 * std::f64::consts::PI).cos()))
        };
        ModelCurves {
            name: format!("gpt {i}"),
            train_loss: (0..steps).map(|step| (step, loss(step) + 0.12 * wave(step, 1.7 + i as f64))).collect(),
            valid_loss: (0..steps).step_by(25).skip(1).map(|step| (step, loss(step) + 0.08)).collect(),
            learning_rate: (0..steps).map(|step| (step, rate(step))).collect(),
            grad_norm: (0..steps)
                .map(|step| (step, 0.6 + 2.0 / (1.0 + step as f64 / 9.0) + 0.2 * wave(step, 2.3)))
                .collect(),
        }
    };
    let mut schedule = Schedule::default();
    let mut account = StepAccount::new(&[], 64);
    let (mut from, mut rows, mut taken) = (0.0, Vec::new(), 0);
    for step in 0..steps.min(200) {
        schedule.step(step as u32, 3 + (step % 7 == 3) as u16);
        schedule.events[taken..].iter().for_each(|event| account.add(event));
        let until = schedule.events[taken..].iter().fold(from, |until: f64, event| until.max(event.end_secs));
        taken = schedule.events.len();
        rows.push(StepBound { step, bound: account.finish_step(from, until) });
        from = until;
    }
    let peak = |kind| if kind == LaneKind::Compute { Some(75e9) } else { Some(2.4e9) };
    let lanes = account
        .sums()
        .iter()
        .map(|&sum| LaneRow { sum, peak_per_sec: peak(sum.lane.kind), busy_share: Some(0.5) })
        .collect();
    ReportData {
        title: "gpt2 small in 64 MiB".into(),
        notes: vec!["200 steps on one host device, link 2 GB/s, 2 slots; 0 events dropped".into()],
        facts: vec![("shards".into(), "3".into()), ("device peak".into(), "64.00 MiB".into())],
        plan_columns: ["shard", "layers", "bytes", "tier", "forward", "backward"].map(String::from).to_vec(),
        plan_rows: (0..3)
            .map(|i| {
                let cells = [&i.to_string(), "4", "21.3 MiB", "pageable", "9.00 ms", "21.00 ms"];
                cells.map(String::from).to_vec()
            })
            .collect(),
        outcome_columns: Vec::new(),
        outcome_rows: Vec::new(),
        devices: Vec::new(),
        models: (0..models).map(curves).collect(),
        steps: rows,
        lanes,
        events: schedule.events.into_iter().filter(|event| event.step < 2).collect(),
        colour_by: ColourBy::What,
        lanes_note: "Over the last step.".into(),
        window: None,
        schedule_note: "Steps 0 and 1.".into(),
    }
}

fn check(data: &ReportData) -> String {
    let page = report_page(data);
    check_tags(&page);
    assert!(!page.contains("NaN") && !page.contains("inf,"), "{page}");
    for outside in ["<script", "<link", "<img", "href=", "src=", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(!page.replace("http://www.w3.org/2000/svg", "").contains("http"));
    assert_eq!(page, report_page(data), "equal data give equal bytes");
    page
}

#[test]
fn every_section_is_there() {
    let data = sample(120, 1);
    let page = check(&data);
    for says in [
        "Where the time went",
        "Schedule",
        "Plan",
        "Learning rate",
        "Gradient norm",
        "device 0 compute",
        "host math",
        "GFLOP/s",
    ] {
        assert!(page.contains(says), "{says}");
    }
    assert!(page.contains("What bound the steps, averaged"), "120 steps are more than the bars there are");
    assert!(check(&sample(31, 3)).contains("What bound each step"));
    let share: f64 = data.steps.iter().map(|step| step.bound.compute).sum();
    let span = data.events.iter().fold(0.0, |span: f64, event| span.max(event.end_secs));
    assert!(share > 0.0 && where_time_went(&data.events, 0.0, span).compute > 0.0);
}

#[test]
fn devices_and_models_have_tables() {
    let mut data = sample(3, 2);
    let row = |device| DeviceRow { device, computes: 0.5, copies: 0.375, copies_alone: 0.125, idle: 0.375 };
    (data.devices, data.steps) = (vec![row(0), row(7)], Vec::new());
    data.outcome_columns = ["model", "status"].map(String::from).to_vec();
    data.outcome_rows = vec![vec!["a<b".into(), "failed: x".into()]];
    data.colour_by = ColourBy::Model;
    let page = check(&data);
    for says in [
        "<td>device 7</td><td class=\"n\">50.0 %</td><td class=\"n\">12.5 %</td><td class=\"n\">37.5 %</td><td class=\"n\">37.5 %</td>",
        "<h2>Models</h2>",
        "<td>a&lt;b</td><td>failed: x</td>",
        ">gpt 0</text>",
    ] {
        assert!(page.contains(says), "{says}");
    }
    assert!(!page.contains("No steps yet") && !page.contains("What bound"));
    assert_eq!(page.matches("Over the last step.").count(), 1);
}

#[test]
fn absence_is_said() {
    let page = check(&ReportData::default());
    for says in ["Training report", "No steps yet", "No values yet", "No events were kept", "The plan lists no shards"]
    {
        assert!(page.contains(says), "{says}");
    }
    let bound = Bound { compute: f64::NAN, ..Bound::default() };
    let models = vec![ModelCurves { name: "one".into(), train_loss: vec![(0, f64::NAN)], ..ModelCurves::default() }];
    let sum = LaneSum::new(crate::base::LaneId::host(LaneKind::DiskRead));
    let lanes = vec![
        LaneRow { sum, peak_per_sec: Some(f64::NAN), busy_share: Some(f64::NAN) },
        LaneRow { sum, peak_per_sec: None, busy_share: None },
    ];
    check(&ReportData { steps: vec![StepBound { step: 0, bound }], models, lanes, ..ReportData::default() });
    for steps in [1, 2, 33] {
        check(&sample(steps, 1));
    }
}

#[test]
fn text_cannot_break_out() {
    let evil = "</title><script>alert(1)</script>\" onload='x' &";
    let mut data = sample(3, 2);
    data.title = evil.into();
    data.notes = vec![evil.into()];
    data.plan_columns = vec![evil.into()];
    data.facts = vec![(evil.into(), evil.into())];
    data.lanes_note = evil.into();
    data.schedule_note = evil.into();
    data.plan_rows = vec![vec![evil.into()], vec![]];
    data.models.iter_mut().for_each(|model| model.name = evil.into());
    data.colour_by = ColourBy::Model;
    let page = check(&data);
    assert!(page.contains("&lt;script&gt;alert(1)"));
}

#[test]
fn rates_are_short() {
    for (value, want) in
        [(0.0, "0.00 B/s"), (999.0, "999.00 B/s"), (2.1e9, "2.10 GB/s"), (3e15, "3.00 PB/s"), (1e20, "100000.00 PB/s")]
    {
        assert_eq!(rate(value, "B/s"), want);
    }
}
