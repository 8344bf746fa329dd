//! What there is: no driver, an old one, one without a device, devices that are too old or of less shared memory. Each in
//! a process of its own, since a process has one driver.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use megacontext_kernels::attention::{Pattern, Rows};
use megacontext_kernels::cuda::attention::Prepared;
use megacontext_kernels::cuda::image::Image;
use megacontext_kernels::cuda::{CudaError, Device, norm, probe};

use crate::attention::{Case, run};
use crate::linear;
use crate::support::{child, driver, emulated_image, preload, probed};

const LIBRARY: &str = "CUDA_DEVICE_LIBRARY";

/// Loads the library that the environment names, before anything asks for a driver.
pub fn load() -> Result<Option<libloading::os::unix::Library>> {
    std::env::var_os(LIBRARY).map(|path| preload(Path::new(&path))).transpose()
}

fn line(name: &str, result: Result<String, CudaError>) {
    println!("{name}: {}", result.unwrap_or_else(|error| error.to_string()));
}

#[test]
#[ignore = "run by the others, in a process of its own"]
fn says() -> Result<()> {
    let _library = load()?;
    let devices = probe().map(|devices| {
        let names = devices.iter().map(|device| {
            let (free, total) = (device.memory_free >> 20, device.memory_total >> 20);
            let target = device.capability.target();
            format!("{} {} ({target}, {free} of {total} MiB free)", device.ordinal, device.name)
        });
        format!("devices {}", names.collect::<Vec<_>>().join(", "))
    });
    line("probe", devices);
    Ok(())
}

#[test]
#[ignore = "run by the others, in a process of its own"]
fn opens() -> Result<()> {
    let _library = load()?;
    let opened = |ordinal| Device::open_with(ordinal, |module, _, _| Ok(emulated_image(module)));
    let device = match opened(0) {
        Ok(device) => device,
        Err(error) => {
            println!("open: {error}");
            return Ok(());
        }
    };
    println!("open: {} {}", device.name(), device.capability());
    let image = |_, _, _| Ok(Image { bytes: b"no image".into(), origin: "a test".into() });
    line("image", Device::open_with(0, image).map(|_| "taken".into()));
    // More shared memory than a small device has is taken with fewer warps.
    run::<f32>(&device, &Case { dims: [1, 70, 2, 1, 256], ..Case::default() }, Pattern::Dense)?;
    run::<half::bf16>(&device, &Case { dims: [1, 70, 2, 1, 256], ..Case::default() }, Pattern::Dense)?;
    println!("attention: runs");
    if let Ok(other) = opened(1) {
        let (x, gain) = (other.zeros::<f32>(8)?, device.zeros::<f32>(8)?);
        let result = norm::rms_forward(&device, &x, &gain, 1e-5, &mut device.zeros::<f32>(8)?);
        println!("other: {}", result.err().context("memory of another device")?);
        let prepared = Prepared::new(&device, [1, 4, 2, 1, 8], 1.0, Pattern::Dense, &Rows::default())?;
        let result = prepared.with_slopes(&other, &[0.5, 0.25]);
        println!("slopes: {}", result.err().context("slopes on another device")?);
        if let Some(_library) = linear::emulated()? {
            println!("products: {}", linear::refused_elsewhere(&device, &other)?);
        }
    }
    Ok(())
}

/// Lines of a child on the emulated driver in this environment; none where there is a GPU or no compiler.
pub fn emulated(test: &str, environment: &[(&str, &str)]) -> Result<Option<String>> {
    if !probed()?.contains("no driver") {
        println!("skipped: there is a driver on this machine");
        return Ok(None);
    }
    let Some(path) = driver()? else { return Ok(None) };
    let path = path.to_str().context("a path in UTF-8")?;
    let mut all = vec![(LIBRARY, path)];
    all.extend(environment);
    let output = child(test, &all)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    Ok(Some(text))
}

fn says_on_the_emulated_driver(environment: &[(&str, &str)], expected: &str) -> Result<()> {
    let Some(text) = emulated("probing::says", environment)? else { return Ok(()) };
    ensure!(text.contains(expected), "expected {expected:?} in {text}");
    Ok(())
}

fn opens_on_the_emulated_driver(environment: &[(&str, &str)], expected: &[&str]) -> Result<()> {
    let Some(text) = emulated("probing::opens", environment)? else { return Ok(()) };
    for expected in expected {
        ensure!(text.contains(expected), "expected {expected:?} in {text}");
    }
    Ok(())
}

#[test]
fn without_a_driver_the_probe_says_so() -> Result<()> {
    let said = probed()?;
    if said.starts_with("probe: devices") {
        println!("skipped: {said}");
        return Ok(());
    }
    println!("{said}");
    let expected =
        "probe: CUDA: no driver: libcuda.so.1 not found (libcuda.so.1: cannot open shared object file: ";
    ensure!(said.starts_with(expected), "{said}");
    Ok(())
}

#[test]
fn a_device_is_found() -> Result<()> {
    let expected = "probe: devices 0 emulated device 0 (sm_80, 16384 of 16384 MiB free)\n";
    says_on_the_emulated_driver(&[], expected)
}

#[test]
fn a_driver_without_a_device_is_named_so() -> Result<()> {
    says_on_the_emulated_driver(
        &[("EMULATED_DEVICES", "0")],
        "probe: CUDA: the driver is there, but no device\n",
    )
}

#[test]
fn a_driver_of_before_cuda_12_is_refused() -> Result<()> {
    let expected =
        "probe: CUDA: the driver is too old: expected one for CUDA 12.0 or newer, got one for CUDA 11.8\n";
    says_on_the_emulated_driver(&[("EMULATED_VERSION", "11080")], expected)
}

#[test]
fn a_driver_of_cuda_13_is_taken() -> Result<()> {
    says_on_the_emulated_driver(&[("EMULATED_VERSION", "13000")], "probe: devices 0 ")
}

#[test]
fn a_device_of_before_ampere_is_refused() -> Result<()> {
    let expected =
        "open: CUDA: device 0 (emulated device 0): expected compute capability 8.0 or newer, got 7.5\n";
    opens_on_the_emulated_driver(&[("EMULATED_CAPABILITY", "75")], &[expected])
}

#[test]
fn code_that_the_driver_does_not_take_is_named() -> Result<()> {
    let expected = "image: CUDA: attention_bounds for sm_80, a test: CUDA_ERROR_INVALID_IMAGE (";
    opens_on_the_emulated_driver(&[], &[expected])
}

#[test]
fn a_device_with_less_shared_memory_runs_with_fewer_warps() -> Result<()> {
    // What sm_86 and sm_89 have.
    let environment = [("EMULATED_CAPABILITY", "86"), ("EMULATED_SHARED", "101376")];
    opens_on_the_emulated_driver(&environment, &["open: emulated device 0 8.6\n", "attention: runs\n"])
}

#[test]
fn memory_of_another_device_is_refused() -> Result<()> {
    let expected = [
        "other: cuda rms_norm: expected x on device 0, got memory of device 1\n",
        "slopes: cuda attention: expected the bounds on device 1, got memory of device 0\n",
        "products: cuda linear: expected products of device 0, got those of device 1\n",
    ];
    opens_on_the_emulated_driver(&[("EMULATED_DEVICES", "2")], &expected)
}
