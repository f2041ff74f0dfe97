// Opens a page in Chromium, light, dark and on a phone, and writes down what is really there: boxes, colours, requests, errors.
// node look.mjs FOLDER_OF_PACKAGES PAGE PICTURE_PREFIX
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const [packages, file, pictures] = process.argv.slice(2);
const require = createRequire(path.join(packages, "package.json"));
const { chromium: playwright } = require("playwright-core");
const bundled = (await import(pathToFileURL(path.join(packages, "node_modules/@sparticuz/chromium/build/esm/index.js")))).default;

const browser = await playwright.launch({
  executablePath: await bundled.executablePath(),
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"],
});
// On a busy machine Chromium now and then has no frame to capture yet.
const take = async (page, path) => {
  for (let left = 5; ; left--) {
    try {
      return await page.screenshot({ path, fullPage: true });
    } catch (error) {
      if (!left || !String(error).includes("Unable to capture screenshot")) throw error;
      await page.waitForTimeout(500);
    }
  }
};
const seen = { requests: [], errors: [] };
const desk = { viewport: { width: 1280, height: 900 } };
const phone = { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true };
for (const scheme of ["light", "dark", "phone"]) {
  const page = await browser.newPage(scheme === "phone" ? phone : { ...desk, colorScheme: scheme });
  page.on("request", (request) => seen.requests.push(request.url()));
  page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  await page.goto(pathToFileURL(path.resolve(file)).href);
  seen[scheme] = await page.evaluate(() => {
    document.querySelectorAll("details").forEach((details) => (details.open = true));
    const box = (element) => {
      const { width, height, left, right } = element.getBoundingClientRect();
      return { width, height, left, right };
    };
    const own = document.querySelector(".diffopt");
    const rows = [...own.querySelectorAll("table.recipes tbody tr")].map((row) => [...row.children].map((cell) => cell.innerText));
    const bars = [...own.querySelectorAll("svg.bars rect.bar")].map((bar) => ({ kind: bar.getAttribute("class"), ...box(bar) }));
    const shown = [...own.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width);
    const pictures = shown.map((svg) => ({ title: svg.querySelector("title")?.textContent, ...box(svg) }));
    // the height of a letter as it is seen: what the style says, times the scale of the picture
    const texts = shown.flatMap((svg) => [...svg.querySelectorAll("text")].filter((text) => text.getBoundingClientRect().width).map((text) => ({
      text: text.textContent,
      size: parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a,
      within: box(svg).left - 1 <= box(text).left && box(text).right <= box(svg).right + 1,
    })));
    const areas = shown.flatMap((svg) => [...svg.querySelectorAll("use, path")].map((one) => box(one)));
    const above = [...document.querySelectorAll("h1, h2, .gate")].map((one) => one.innerText);
    return {
      rows,
      bars,
      pictures,
      texts,
      areas,
      above,
      headings: [...own.querySelectorAll("table.recipes thead th")].map((cell) => cell.innerText),
      gate: own.querySelector(".gate").innerText,
      widest: document.documentElement.scrollWidth,
      text: getComputedStyle(own).color,
      back: getComputedStyle(own).backgroundColor,
    };
  });
  let pictured = page;
  if (scheme === "phone") {  // Chromium pictures no whole page of a phone: a window of that width stands in
    pictured = await browser.newPage({ viewport: phone.viewport });
    await pictured.goto(page.url());
    await pictured.evaluate(() => document.querySelectorAll("details").forEach((details) => (details.open = true)));
  }
  await take(pictured, `${pictures}-${scheme}.png`);
  await page.close();
}
await browser.close();
console.log(JSON.stringify(seen));
